"""Results as COCO's evaluation server takes them: a test set's annotations are not public, so nothing is scored here."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = {"bbox": "bbox", "segm": "segmentation"}
"""What the server scores, and the field it reads of each entry."""
_COMMON = ("image_id", "category_id", "score")


def server_files(results: Sequence[dict[str, Any]], image_info: Path, submission: Path) -> dict[str, bytes]:
    """Pack one zip for each kind that the entries have, in a folder of that kind, with a JSON of the same name inside.

    Args:
        results: entries of COCO's results format with boxes and, or not, masks.
        image_info: the file that lists the test set's images; the set's name stands behind the last underscore.
        submission: a folder by whose name the server is to call the results; what is no letter, digit, dot or hyphen in it is
            taken out.

    Returns:
        content by path: bbox/detections_TEST_NAME_results.zip and segm/detections_TEST_NAME_results.zip.
    """
    # The server takes the name apart at the underscores.
    test = image_info.stem.rpartition("_")[2]
    stem = f"detections_{test}_{re.sub('[^A-Za-z0-9.-]', '', submission.resolve().name) or 'permafrost'}_results"
    files = {}
    for kind, field in KINDS.items():
        if results and field not in results[0]:
            continue
        content = json.dumps([{**{key: entry[key] for key in _COMMON}, field: entry[field]} for entry in results])
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{stem}.json", content)
        files[f"{kind}/{stem}.zip"] = packed.getvalue()
    return files

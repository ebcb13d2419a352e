"""Name the classes: from the data set's own table, or as ADE20K names its 150."""

from __future__ import annotations

from pathlib import Path

from permafrost.data.errors import DataError

# First names of objectInfo150.txt of the SceneParsing release, in the order of the labels 1 to 150.
ADE20K_CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
    mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence,
    desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
    river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island,
    computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight,
    booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage,
    van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor,
    bulletin board, shower, radiator, glass, clock, flag""".replace("\n    ", " ").split(", ")
)
ADE20K_TABLE = "objectInfo150.txt"
MAX_CLASSES = 255
"""Labels are bytes, and 0 means that nobody knows."""


def read_classes(path: Path) -> list[str]:
    """Read the names in the order of the labels from a table as in the SceneParsing release.

    Tabs between columns; the first is the label, counted from 1, the last the name, of which what stands before a comma or
    semicolon is taken. The first line names the columns. ADE20K's own table may be missing.

    Raises:
        DataError: there is no such table, or it is of another form; says in which line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if path.name == ADE20K_TABLE:
            return list(ADE20K_CLASSES)
        raise DataError(f"{path}: there is no such table of classes (data.class_info)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the table of classes cannot be read: {error}") from error
    names: list[str] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        label, *_, name = (cell.strip() for cell in ("\t" + line).split("\t")[1:]) if "\t" in line else ("", "")
        name = name.replace(";", ",").partition(",")[0].strip()
        if label != str(len(names) + 1) or not name:
            raise DataError(
                f"{path}: line {number} is {line[:60]!r}, expected label {len(names) + 1}, a tab, and its name in the last column"
            )
        names.append(name)
    if not 1 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{path}: it names {len(names)} classes, expected 1 to {MAX_CLASSES}")
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: several classes are called {', '.join(double)}: give each a name of its own")
    return names

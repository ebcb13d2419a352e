"""Videos: reads them, samples frames, augments clips, and decodes in processes that can be killed."""

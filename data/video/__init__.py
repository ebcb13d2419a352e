"""Videos: reading, sampling of frames, augmentation of clips, decoding in processes that can be killed."""

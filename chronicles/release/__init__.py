"""What a released model tells about itself: model card, data statement, provenance. Pure functions of the record."""

"""Cheaper versions of a refitted model, one short file a technique; each is a package like the refitted one's."""

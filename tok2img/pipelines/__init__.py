"""Pipelines from captions to images and from images to captions."""

"""Pipelines from captions to images and from images to captions.

Importing this package adds the task "text-to-image" to `transformers.pipeline`.
"""

from .transformers_task import register_task

register_task()

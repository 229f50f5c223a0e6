"""Sheets of images and charts."""

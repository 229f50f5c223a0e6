// Takes the place of the theme's default polyfill, which would be loaded from a CDN. Without it the search box
// works on a served manual (`mkdocs serve`), but not on pages opened from the disk.

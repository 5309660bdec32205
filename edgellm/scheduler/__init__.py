"""Who runs when. Imports no device library and no socket: it is tested on any laptop."""

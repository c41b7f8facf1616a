"""The HTML page of an evaluation. `page`, `charts` and the figures know no task; `assembly` puts the page together."""

"""The HTML page of an evaluation: `page` and `charts` know no task, figures draw artefacts, `assembly` puts them together."""

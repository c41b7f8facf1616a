"""Scripts that make the embedded data sets from pinned public packages; not needed to use them."""

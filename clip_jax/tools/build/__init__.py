"""Scripts that build the embedded data sets from pinned public packages. Using the sets does not need them."""

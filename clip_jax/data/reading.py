"""How records are ordered and read: the fields of the configuration that the loader takes."""

from typing import NamedTuple


class Reading(NamedTuple):
    """How the records of a source are ordered and read, see docs/data.md.

    Attributes:
      order: str, "auto", "records" or "blocks"; "auto" reads blocks where single records cost a request.
      lanes: int, the number of lanes of the order by blocks; 0 chooses it by the batch size.
      window: int, the blocks of a lane within which records are shuffled.
    """

    order: str = "auto"
    lanes: int = 0
    window: int = 8


AUTO = Reading()


def configured_reading(data):
    """Returns the `Reading` of the configuration's section `data`."""
    return Reading(data.order, data.lanes, data.window)

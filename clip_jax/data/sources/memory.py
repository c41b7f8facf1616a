"""Records in memory."""

from clip_jax.data.records import BaseSource, with_texts
from clip_jax.errors import UserError


class MemorySource(BaseSource):
    """Records in memory, in canonical form: `MemorySource([{"image": array, "texts": ["a cat"]}, ...])`.

    Args:
      records: a sequence of dicts; see `clip_jax.data.records`. `texts` is empty by default.
      name: str, for messages.
      class_names: list of str, indexed by label, or None. A label may then also be a class name.

    Raises UserError for an empty sequence.
    """

    def __init__(self, records, name="memory", class_names=None):
        super().__init__(name)
        if not len(records):
            raise UserError(f"{name}: the source is empty")
        self._records = records
        if class_names is not None:
            self._set_classes(class_names)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        record = dict(self._records[index])
        record = with_texts(record, [record.get("texts")])
        if "label" in record:
            record["label"] = label = self._label(record["label"])
            if self.class_names is not None and label >= 0:
                record.setdefault("class_name", self._class_name(label))
        return record

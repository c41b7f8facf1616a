"""Records in memory."""

from clip_jax.data.records import PEEKED, BaseSource, is_list, with_texts
from clip_jax.errors import UserError


class MemorySource(BaseSource):
    """Records in memory, in canonical form: `MemorySource([{"image": array, "texts": ["a cat"]}, ...])`.

    Args:
      records: a sequence of dicts; see `clip_jax.data.records`. `texts` is empty by default.
      name: str, for messages.
      class_names: list of str, indexed by label, or None. A label may then also be a class name.

    A list in `label` holds several labels of one image; the labels of all records are then tuples. A sequence other
    than a list or tuple is searched for one in its first records only.

    Raises UserError for an empty sequence.
    """

    def __init__(self, records, name="memory", class_names=None):
        super().__init__(name)
        if not len(records):
            raise UserError(f"{name}: the source is empty")
        self._records = records
        is_held = isinstance(records, list | tuple)
        peeked = records if is_held else (records[i] for i in range(min(len(records), PEEKED)))
        self.multi_label = any(is_list(record.get("label")) for record in peeked)
        if class_names is not None:
            self._set_classes(class_names)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        record = dict(self._records[index])
        record = with_texts(record, [record.get("texts")])
        if "label" in record:
            record["label"] = self._label(record["label"])
            self._add_class_name(record)
        return record

    def naming(self, record):
        return f"give the class_names of {self.name}"

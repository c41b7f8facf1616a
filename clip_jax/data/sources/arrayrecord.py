"""ArrayRecord files."""

from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.errors import UserError


class ArrayRecordSource(BaseSource):
    """ArrayRecord files of serialised tf.train.Example, without TensorFlow. A feature with one value is read as a scalar."""

    def __init__(self, files, name="array_record", *, image=None, text=None, label=None):
        super().__init__(name, image, text, label)
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            self._data = ArrayRecordDataSource(list(files))
        except Exception as error:  # the C++ reader raises several classes
            raise UserError(f"{name}: not readable as ArrayRecord: {str(error).splitlines()[0]}") from None
        if not len(self._data):
            raise UserError(f"{name}: no records")
        fields = self._peek(self._features)
        if not fields:
            raise UserError(f"{name}: the first records are not serialised tf.train.Example")
        images = [key for key, value in fields.items() if isinstance(value, bytes) and _is_image(value)]
        if image is None and images:
            self._fields = (images[0], *self._fields[1:])
        self._choose_fields(fields)
        self._drop_text_label(fields, asked=label is not None)

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        return self._canonical(self._features(index))

    def _features(self, index):
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            features = tf_example_pb2.Example.FromString(self._data[index]).features.feature
        except Exception:
            raise BadRecord("malformed record") from None
        values = {
            key: list(getattr(feature, feature.WhichOneof("kind") or "int64_list").value)
            for key, feature in features.items()
        }
        return {key: value[0] if len(value) == 1 else value for key, value in values.items()}


def _is_image(data):
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or data[8:12] == b"WEBP"

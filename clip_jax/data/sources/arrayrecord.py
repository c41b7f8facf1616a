"""ArrayRecord files of `tf.train.Example`."""

from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.errors import UserError


class ArrayRecordSource(BaseSource):
    """ArrayRecord files of serialised `tf.train.Example`, read without TensorFlow.

    A feature with one value is read as a scalar, another as a list. The first feature that holds an encoded image is
    the image field unless one is named.

    Args:
      files: list of paths.
      name: str, for messages.
      image: name of the image feature, or None.
      text: name or names of the caption features, or None.
      label: name of the label feature, or None.

    Raises UserError for files that are not ArrayRecord, have no records or hold no `tf.train.Example`.
    """

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
            self._fields = self._fields._replace(image=images[0])
        self._choose_fields(fields)
        self._check_label_field(fields, asked=label is not None)
        self._files_of_labels = list(files)

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
        kinds = {key: feature.WhichOneof("kind") or "int64_list" for key, feature in features.items()}
        values = {key: list(getattr(feature, kinds[key]).value) for key, feature in features.items()}
        return {key: value[0] if len(value) == 1 else value for key, value in values.items()}


def _is_image(data):
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or data[8:12] == b"WEBP"

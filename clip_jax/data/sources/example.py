"""Serialised `tf.train.Example`, the records of TFRecord and ArrayRecord shards, read without TensorFlow.

The messages are those of tensorflow/core/example/example.proto and feature.proto. They are declared here in a pool of
their own, because the import of a package that holds them takes half a second.
"""

import functools

from clip_jax.data.records import BadRecord, usual_image

_KINDS = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}


@functools.cache
def _example():
    """Returns the class of the message `Example`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="clip_jax", syntax="proto3")

    def add(message, name, number, kind, is_list=False, **more):
        label = field.LABEL_REPEATED if is_list else field.LABEL_OPTIONAL
        is_plain = isinstance(kind, int)
        typed = {"type": kind} if is_plain else {"type": field.TYPE_MESSAGE, "type_name": f".clip_jax.{kind}"}
        message.field.add(name=name, number=number, label=label, **typed, **more)

    for name, kind in zip(_KINDS.values(), (field.TYPE_BYTES, field.TYPE_FLOAT, field.TYPE_INT64), strict=True):
        add(file.message_type.add(name=name), "value", 1, kind, is_list=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(_KINDS.items(), 1):
        add(feature, name, number, kind, oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", is_list=True)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("clip_jax.Example"))


def parse(data):
    """Returns the features of a serialised `tf.train.Example`, `{name: value}` in the order of their names.

    A value is bytes, float or int where the feature has one value, and else the list of them. Raises BadRecord for
    bytes that are no such message.

    Args:
      data: bytes.
    """
    try:
        features = _example().FromString(data).features.feature
    except Exception:  # the implementations of protobuf raise several classes
        raise BadRecord("malformed record") from None
    values = {}
    for name in sorted(features):
        kind = features[name].WhichOneof("kind")
        found = list(getattr(features[name], kind).value) if kind else []
        values[name] = found[0] if len(found) == 1 else found
    return values


def preferred(fields):
    """Returns `{"image": name}` of a feature that holds an encoded image, the one of the most usual name.

    Args:
      fields: the first value of each feature.
    """
    images = [name for name, value in fields.items() if isinstance(value, bytes) and _is_image(value)]
    return {"image": usual_image(images) or images[0]} if images else {}


def _is_image(data):
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or data[8:12] == b"WEBP"

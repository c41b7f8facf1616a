"""Shards of `tf.train.Example` for tests, serialised by TFDS's own messages."""

import struct


def example(fields):
    """A serialised `tf.train.Example` of values or lists of them: bytes, str, int or float."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def feature(value):
        values = [v.encode() if isinstance(v, str) else v for v in (value if isinstance(value, list) else [value])]
        if not values:
            return tf_feature_pb2.Feature()
        if isinstance(values[0], int):
            return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
        if isinstance(values[0], float):
            return tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))

    features = tf_feature_pb2.Features(feature={key: feature(value) for key, value in fields.items()})
    return tf_example_pb2.Example(features=features).SerializeToString()


def _serialised(rows):
    return [row if isinstance(row, bytes) else example(row) for row in rows]


def write_array_record(path, rows, options="group_size:1"):
    """Writes an ArrayRecord file of examples; bytes are records as they are."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), options)
    for row in _serialised(rows):
        writer.write(row)
    writer.close()


def crc32c(data):
    """The CRC-32C of bytes by its definition, bit by bit (polynomial 0x1EDC6F41, reflected 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tfrecord(rows):
    """The bytes of a TFRecord shard, its checksums by `crc32c`; small records, since they are slow."""

    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15) + (crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)

    parts = []
    for row in _serialised(rows):
        head = struct.pack("<Q", len(row))
        parts += [head, masked(head), row, masked(row)]
    return b"".join(parts)

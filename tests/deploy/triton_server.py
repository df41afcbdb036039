"""Stands in for Triton: serves a model repository by the KServe protocol, through ONNX Runtime.

It knows nothing of `deploy`: it reads config.pbtxt with protobuf, by the names and types of
Triton's model_config.proto, and refuses what Triton refuses.
"""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime as ort
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

DATA_TYPES = ("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32")
KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
MESSAGES = {
    "ModelParameter": {"string_value": "string"},
    "Entry": {"key": "string", "value": ".ModelParameter"},
    "ModelInput": {"name": "string", "data_type": ".DataType", "dims": "int64*"},
    "ModelOutput": {
        "name": "string",
        "data_type": ".DataType",
        "dims": "int64*",
        "label_filename": "string",
    },
    "ModelInstanceGroup": {"kind": ".Kind", "count": "int32"},
    "ModelDynamicBatching": {"max_queue_delay_microseconds": "uint64"},
    "ModelConfig": {
        "name": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": ".ModelInput*",
        "output": ".ModelOutput*",
        "instance_group": ".ModelInstanceGroup*",
        "dynamic_batching": ".ModelDynamicBatching",
        "parameters": ".Entry*",  # a map there; written the same way
    },
}
NUMPY = {"UINT8": "u1", "INT32": "<i4", "FP32": "<f4"}
LENGTH = "Inference-Header-Content-Length"


def config_class():
    """The protobuf class of ModelConfig with the fields above."""
    file = descriptor_pb2.FileDescriptorProto(name="triton_stand_in.proto", syntax="proto3")
    for name, values in (("DataType", DATA_TYPES), ("Kind", KINDS)):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            entry = message.field.add(name=field, number=number, label=3 if "*" in kind else 1)
            kind = kind.rstrip("*")
            if kind.startswith("."):
                entry.type_name, entry.type = kind, 14 if kind in (".DataType", ".Kind") else 11
            else:
                entry.type = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ModelConfig"))


def read_config(folder):
    """config.pbtxt of a model folder; protobuf's ParseError if it is not well-formed."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), config_class()())


class TritonStandIn:
    """All models of a repository, latest version each."""

    def __init__(self, repository):
        self.models = {}
        for folder in repository.iterdir():
            version = max(path.name for path in folder.iterdir() if path.name.isdecimal())
            session = ort.InferenceSession(folder / version / "model.onnx")
            self.models[folder.name] = (read_config(folder), version, session)

    def answer(self, path, body, headers):
        """Status, body and headers for one request; `body` None is a GET."""
        try:
            _, v2, models, name, *rest = path.split("/")
            assert (v2, models) == ("v2", "models")
            config, version, session = self.models[name]
            if rest == ["config"]:
                return 200, json.dumps(self._config(config)).encode(), {}
            if rest == []:
                return 200, json.dumps({"name": name, "versions": [version]}).encode(), {}
            assert rest == ["infer"]
            return 200, *self._infer(config, session, body, headers)
        except (AssertionError, LookupError, ValueError) as error:
            return 400, json.dumps({"error": f"refused: {error}"}).encode(), {}

    @staticmethod
    def _config(config):
        parameters = {e.key: {"string_value": e.value.string_value} for e in config.parameters}
        return {"max_batch_size": config.max_batch_size, "parameters": parameters}

    @staticmethod
    def _infer(config, session, body, headers):
        start = int(headers[LENGTH])
        request, feed = json.loads(body[:start]), {}
        declared = {tensor.name: tensor for tensor in config.input}
        for tensor in request["inputs"]:
            size, shape = tensor["parameters"]["binary_data_size"], tensor["shape"]
            values = np.frombuffer(body[start : start + size], NUMPY[tensor["datatype"]])
            start, entry = start + size, declared.pop(tensor["name"])
            assert DATA_TYPES[entry.data_type] == "TYPE_" + tensor["datatype"], tensor
            dims, batched = list(entry.dims), config.max_batch_size > 0
            assert not batched or 1 <= shape[0] <= config.max_batch_size, f"batch {shape}"
            sides = shape[1:] if batched else shape
            assert len(sides) == len(dims), f"{shape} for {dims}"
            assert all(d in (-1, side) for d, side in zip(dims, sides)), f"{shape} for {dims}"
            feed[tensor["name"]] = values.reshape(shape)
        assert not declared and start == len(body), f"missing {list(declared)}"
        names = [output["name"] for output in request["outputs"]]
        types = {tensor.name: DATA_TYPES[tensor.data_type][5:] for tensor in config.output}
        outputs, blobs = [], []
        for name, value in zip(names, session.run(names, feed)):
            blobs.append(value.astype(NUMPY[types[name]], casting="equiv").tobytes())
            shape, size = list(value.shape), {"binary_data_size": len(blobs[-1])}
            outputs.append(
                {"name": name, "datatype": types[name], "shape": shape, "parameters": size}
            )
        header = json.dumps({"model_name": config.name, "outputs": outputs}).encode()
        return b"".join([header, *blobs]), {LENGTH: str(len(header))}


def answering(body, status=200, headers=None):
    """What `serve` takes: always the same answer."""
    return lambda *_: (status, body, headers or {})


@contextmanager
def serve(answer):
    """A HTTP server on a free port of this machine; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.respond(None)

        def do_POST(self):
            self.respond(self.rfile.read(int(self.headers["Content-Length"])))

        def respond(self, body):
            status, content, headers = answer(self.path, body, self.headers)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that waited long enough
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Google Cloud Storage on this machine: gcp-storage-emulator in a process of its own.

The emulator answers as the service does but for three things that gcsfs and TensorStore ask for,
which are added here: the generation of what was read, writes and reads that depend on it, and
moving a file. Run as `python -m tests.buckets` it says its port and serves until its input ends.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import HTTPServer

import numpy as np

from salt_jax.io import files
from tests.helpers import ROOT

NAME = "salt-tests"
_numbers = itertools.count()


@contextmanager
def emulator() -> Iterator[str]:
    """The address of a running one. Libraries of this process, and of those that it starts, take
    it for the service meanwhile.
    """
    command, pipe = [sys.executable, "-m", "tests.buckets"], subprocess.PIPE
    quiet = dict(stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, cwd=ROOT, **quiet) as server:
        assert server.stdout
        address = f"http://localhost:{int(server.stdout.readline())}"
        with service_at(address):
            yield address
        server.kill()


@contextmanager
def service_at(address: str) -> Iterator[None]:
    """Libraries take this address for the service meanwhile."""
    names = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs, and Google's own library
        "TENSORSTORE_GCS_HTTP_URL": address,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # array_record
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GOOGLE_CLOUD_PROJECT": "tests",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    files._buckets.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        files._buckets.cache_clear()


def new_folder() -> str:
    """The address of a folder that nothing is in yet."""
    return f"gs://{NAME}/{next(_numbers)}"


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """How many bytes each request for a part of a file in a bucket asks for."""
    seen: list[int] = []
    whole = files._buckets()

    class Counting:
        def cat_ranges(self, names, starts, ends, **options):
            seen.extend(np.subtract(ends, starts).tolist())
            return whole.cat_ranges(names, starts, ends, **options)

        def __getattr__(self, name):
            return getattr(whole, name)

    before, files._buckets = files._buckets, Counting
    try:
        yield seen
    finally:
        files._buckets = before


def serve() -> None:
    """Does not return."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def named(request) -> str | None:
        """The file that a request is about; None: that is known from an earlier one."""
        if "object_id" in request.params or "name" in request.query:
            return request.params.get("object_id") or request.query["name"][0]
        if "upload_id" in request.query:
            return None
        return request.data.get("meta", request.data)["name"]

    def generation(request, storage) -> int | None:
        """0: there is no such file."""
        name = named(request)
        try:
            there = name and storage.get_file_obj(request.params["bucket_name"], name)
        except NotFound:
            return 0
        return int(there["generation"]) if there else None

    def asked(request, condition: str) -> int | None:
        values = request.query.get(condition)
        return int(values[0]) if values else None

    def conditional(handler):
        """A handler that does nothing where a file is not of the generation that is asked for."""

        def handle(request, response, storage, *args, **kwargs):
            now = generation(request, storage)
            if now and asked(request, "ifGenerationNotMatch") == now:
                response.status = HTTPStatus.NOT_MODIFIED
            elif now is not None and asked(request, "ifGenerationMatch") not in (None, now):
                response.status = HTTPStatus.PRECONDITION_FAILED
            else:
                handler(request, response, storage, *args, **kwargs)
                if handler is download and now:
                    response["x-goog-generation"] = str(now)

        return handle

    def move(request, response, storage):
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        if response.status == HTTPStatus.OK:
            storage.delete_file(request.params["bucket_name"], request.params["object_id"])

    download = objects.download
    guarded = {h: conditional(h) for h in (objects.insert, objects.delete, download)}
    objects.download = guarded[download]  # another handler calls it
    within = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)"
    server.HANDLERS = (
        (within + r"/moveTo/o/(?P<dest_object_id>.*[^/]+)$", {"POST": move}),
        *(
            (pattern, {method: guarded.get(handler, handler) for method, handler in there.items()})
            for pattern, there in server.HANDLERS
        ),
    )
    # with the usual 5 the sixth that waits is dropped, and comes again seconds later
    HTTPServer.request_queue_size = 512
    running = server.create_server("localhost", 0, in_memory=True, default_bucket=NAME)
    running.start()
    print(running._api._httpd.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve()

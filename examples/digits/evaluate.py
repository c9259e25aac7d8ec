"""Measures the running service on the held-out images: `python examples/digits/evaluate.py --url URL`."""

import argparse
import io
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import numpy as np
from PIL import Image as Picture

from examples.digits.data import Image, load


def post(url: str, body: bytes, content_type: str) -> int:
    request = urllib.request.Request(url, data=body, headers={"content-type": content_type})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        return int(json.load(response)["digit"])


def as_json(url: str, image: Image) -> int:
    return post(f"{url}/predict", json.dumps({"pixels": image.tolist()}).encode(), "application/json")


def png_of(image: Image) -> bytes:
    """The image as a person would scan it: dark on light, eight times as large."""
    light = (255 - image * 255 / 16).astype(np.uint8)
    out = io.BytesIO()
    Picture.fromarray(np.kron(light, np.ones((8, 8), dtype=np.uint8))).save(out, "PNG")
    return out.getvalue()


def as_png(url: str, image: Image) -> int:
    boundary = uuid4().hex
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="digit.png"\r\n\r\n'
    body = head.encode() + png_of(image) + f"\r\n--{boundary}--\r\n".encode()
    return post(f"{url}/upload", body, f"multipart/form-data; boundary={boundary}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/digits")
    parser.add_argument("--png", action="store_true", help="upload PNG files instead of JSON pixels")
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    url, ask = options.url.rstrip("/"), as_png if options.png else as_json
    _, held_out = load()
    began = time.perf_counter()
    with ThreadPoolExecutor(options.connections) as pool:
        answers = list(pool.map(lambda image: ask(url, image), held_out.images))
    seconds = time.perf_counter() - began
    right = int((np.array(answers) == held_out.digits).sum())
    total = len(answers)
    print(f"accuracy {right / total:.4f} ({right} of {total} held-out images), {total / seconds:.0f} images/s")


if __name__ == "__main__":
    main()

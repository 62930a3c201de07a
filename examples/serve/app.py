"""A page that classifies images with an exported folder: drop one, see the five likeliest classes.

    pip install -e '.[onnx,serve]'
    effnet-hf export --model runs/b0 --output_dir runs/b0-onnx
    python examples/serve/app.py --model runs/b0-onnx              then open http://127.0.0.1:8000

    curl -F image=@cat.jpg http://127.0.0.1:8000/classify        the same as JSON

An example to start from: one process, no accounts, no queue. Put a server such as nginx in front of it for the world.
"""

import html
import io
import threading
import warnings
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image, UnidentifiedImageError

from effnet_hf.cli import ArgumentParser, run
from effnet_hf.export import ONNXEfficientNet
from effnet_hf.image_processing_efficientnet_nv import to_rgb


MAX_BYTES = 10 * 2**20
MAX_PIXELS = 50_000_000  # decoded: 150 MB
PAGE = Path(__file__).with_name("page.html")


def make_app(model: ONNXEfficientNet, name: str = "EfficientNet") -> FastAPI:
    """`GET /` is the page, `POST /classify` takes one image as form field `image`.

    Answers 413 to more than 10 MB or 50 megapixels, 415 to what is not an image, 422 to a form without one; `detail`
    says so in a sentence.
    """
    app = FastAPI(title=name)
    turn = threading.Lock()  # one image at a time: they would only slow each other down

    @app.middleware("http")
    async def limit(request: Request, call_next):
        if int(request.headers.get("content-length") or 0) > MAX_BYTES + 4096:
            return JSONResponse({"detail": f"The image is larger than {MAX_BYTES >> 20} MB."}, 413)
        return await call_next(request)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE.read_text("utf-8").replace("{{name}}", html.escape(name))

    @app.get("/healthz")
    def healthz() -> dict:
        return {"ok": True, "classes": model.config.num_labels}

    @app.post("/classify")
    def classify(image: UploadFile) -> dict:
        data = image.file.read(MAX_BYTES + 1)  # a body sent in chunks names no length
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"The image is larger than {MAX_BYTES >> 20} MB.")
        opened = open_image(data)
        with turn:
            predictions = model.classify(opened, top_k=5)
        return {"width": opened.width, "height": opened.height, "predictions": predictions}

    return app


def open_image(data: bytes) -> Image.Image:
    """Upright RGB, or an `HTTPException` that says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise HTTPException(413, f"The image has more than {MAX_PIXELS // 10**6} megapixels.")
            return to_rgb(image)
    except Image.DecompressionBombError:
        raise HTTPException(413, f"The image has more than {MAX_PIXELS // 10**6} megapixels.") from None
    except UnidentifiedImageError:
        raise HTTPException(415, "This file is not an image that can be read (JPEG, PNG, WebP, …).") from None
    except (OSError, ValueError, SyntaxError):
        raise HTTPException(415, "This image is damaged and cannot be read.") from None


def main() -> None:
    parser = ArgumentParser(description="Serve a page that classifies images.")
    parser.add_argument("--model", required=True, help="folder that `effnet-hf export` wrote, or a Hub id of one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="where to listen")
    args = parser.parse_args()
    import uvicorn

    model = ONNXEfficientNet.from_pretrained(args.model)
    print(f"http://{args.host}:{args.port}")
    uvicorn.run(make_app(model, Path(args.model).name), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    run(main)

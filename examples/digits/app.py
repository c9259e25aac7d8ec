"""Three deployments that do one thing each, and the one with the routes that composes them."""

import asyncio
import io
from typing import Annotated, TypedDict

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field

from qserve import serve

SIDE = 8
INK = 16.0
Pixels = npt.NDArray[np.float64]


class Prediction(TypedDict):
    digit: int
    score: float
    scores: list[float]


class Explanation(TypedDict):
    digit: int
    importance: list[list[float]]


@serve.deployment(route_prefix=None, idempotent=True)
class Preprocessor:
    """Turns any picture of a digit into what the classifier learned from: 8 x 8 pixels, 0 (paper) to 16 (ink)."""

    def png(self, data: bytes) -> Pixels:
        try:
            picture = Image.open(io.BytesIO(data)).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError("the upload is not an image") from error
        light = np.asarray(picture, dtype=np.float64) / 255
        edge = np.concatenate([light[0], light[-1], light[1:-1, 0], light[1:-1, -1]])
        ink = 1 - light if edge.mean() > 0.5 else light  # dark on light, or light on dark
        return ink * INK


@serve.deployment(route_prefix=None, idempotent=True, max_concurrent_queries=200)
class Classifier:
    """A support vector machine, trained in a fraction of a second when the replica starts."""

    def __init__(self) -> None:
        # Imported here so that only the classifier's own replicas load scikit-learn.
        from sklearn.svm import SVC  # noqa: PLC0415

        from examples.digits.data import load  # noqa: PLC0415

        train, _ = load()
        self.model = SVC(gamma=0.001)
        self.model.fit(train.images.reshape(-1, SIDE * SIDE), train.digits)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.002)
    async def __call__(self, images: list[Pixels]) -> list[Prediction]:
        margins = self.model.decision_function(np.stack(images).reshape(-1, SIDE * SIDE))
        exponents = np.exp(margins - margins.max(axis=1, keepdims=True))
        return [
            {"digit": int(row.argmax()), "score": float(row.max()), "scores": row.round(4).tolist()}
            for row in exponents / exponents.sum(axis=1, keepdims=True)
        ]


@serve.deployment(route_prefix=None, idempotent=True)
class Explainer:
    """Finds the pixels an answer rests on: how far the digit's score falls when they are wiped out."""

    def __init__(self) -> None:
        self.classifier = Classifier.get_handle(sync=False)

    async def __call__(self, prediction: Prediction, pixels: Pixels) -> Explanation:
        refs = [await self.classifier.remote(wiped) for wiped in self._wiped(pixels)]
        answers: list[Prediction] = await asyncio.gather(*refs)
        digit = prediction["digit"]
        falls = np.array([prediction["scores"][digit] - answer["scores"][digit] for answer in answers])
        return {"digit": digit, "importance": falls.reshape(SIDE // 2, SIDE // 2).round(4).tolist()}

    def _wiped(self, pixels: Pixels) -> list[Pixels]:
        wiped = []
        for row in range(0, SIDE, 2):
            for column in range(0, SIDE, 2):
                copy = pixels.copy()
                copy[row : row + 2, column : column + 2] = 0
                wiped.append(copy)
        return wiped


Row = Annotated[list[Annotated[float, Field(ge=0, le=INK)]], Field(min_length=SIDE, max_length=SIDE)]


class Drawing(BaseModel):
    pixels: Annotated[list[Row], Field(min_length=SIDE, max_length=SIDE)]


class Answer(BaseModel):
    digit: int
    score: float
    scores: list[float]
    importance: list[list[float]] | None = None


app = FastAPI(title="Digits")


@serve.deployment(route_prefix="/digits")
@serve.ingress(app)
class Digits:
    def __init__(self) -> None:
        self.preprocessor = Preprocessor.get_handle(sync=False)
        self.classifier = Classifier.get_handle(sync=False)
        self.explainer = Explainer.get_handle(sync=False)

    @app.get("/")
    async def usage(self) -> dict[str, str]:
        """What there is to try, for somebody who only has the address."""
        upload = "curl -F file=@examples/digits/seven.png 'http://127.0.0.1:8000/digits/upload?explain=true'"
        return {"upload a picture": upload, "measure the accuracy": "python examples/digits/evaluate.py"}

    @app.post("/predict")
    async def predict(self, drawing: Drawing, explain: bool = False) -> Answer:
        """The digit in 8 rows of 8 numbers from 0 (paper) to 16 (ink)."""
        return await self.answer(np.array(drawing.pixels), explain)

    @app.post("/upload")
    async def upload(self, file: UploadFile, explain: bool = False) -> Answer:
        """The digit in a picture of any size, dark on light or light on dark."""
        picture = await self.preprocessor.png.remote(await file.read())
        try:
            pixels = await picture
        except ValueError as error:
            raise HTTPException(422, "the upload is not an image") from error
        return await self.answer(pixels, explain)

    async def answer(self, pixels: Pixels, explain: bool = False) -> Answer:
        """What both routes return; call it through a handle to skip HTTP."""
        prediction = await self.classifier.remote(pixels)
        if not explain:
            return Answer(**await prediction)
        # The prediction goes on as a ref: the explainer is given its value, this replica need not wait for it.
        explanation = await self.explainer.remote(prediction, pixels)
        return Answer(**await prediction, importance=(await explanation)["importance"])

"""One engine's HTTP server: questions with deadlines, and errors that say who said what.

endpoint = Endpoint("http://127.0.0.1:8000")
info = endpoint.get("/weight_info")
endpoint.post("/resume")
"""

from __future__ import annotations

import os
from typing import Any

import httpx
import msgspec

from checkpoint_engine.errors import MALFORMED, AdapterError, UsageError

__all__ = ["Endpoint"]

ANSWER_SECONDS = 10.0
MAX_SAID_CHARACTERS = 2000


class _Model(msgspec.Struct):
    owned_by: str
    id: str = ""
    root: str | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class Endpoint:
    """Asks one server, with the user's token if there is one. Holds no connection.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
        uds: path of a Unix socket to send requests through.

    Attributes:
        url: without a slash at its end.

    Raises:
        UsageError: it is no URL.
    """

    def __init__(self, url: str, *, uds: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no URL of a server, as http://127.0.0.1:8000 is")
        self.url = url.rstrip("/")
        self._uds = uds

    def get(self, path: str, *, timeout_seconds: float = ANSWER_SECONDS) -> Any:
        """The decoded answer; None if it is empty.

        Raises:
            AdapterError: there is none, or it is an error, or no JSON.
        """
        return self._ask("GET", path, None, timeout_seconds)

    def post(
        self, path: str, body: object = None, *, timeout_seconds: float = ANSWER_SECONDS
    ) -> Any:
        """The decoded answer to a JSON body, as of `get`; raises likewise."""
        return self._ask("POST", path, body, timeout_seconds)

    def tell(self, path: str, body: object, *, timeout_seconds: float) -> None:
        """Post where the answer says no more than that it was done, in whatever form.

        Raises:
            AdapterError: there is none, or it is an error.
        """
        self._checked("POST", path, body, timeout_seconds)

    def status(self, path: str) -> int:
        """The HTTP status of the answer, where that says it all.

        Raises:
            AdapterError: it does not answer.
        """
        return self._send("GET", path, None, ANSWER_SECONDS).status_code

    def owner(self) -> str:
        """Who owns the server's model, in OpenAI's terms: the kind of engine; "" if it is unsaid.

        Raises:
            AdapterError: it does not answer.
        """
        response = self._send("GET", "/v1/models", None, ANSWER_SECONDS)
        try:
            models = msgspec.json.decode(response.content, type=_Models).data
        except MALFORMED:
            return ""
        return models[0].owned_by if models else ""

    def loras(self) -> dict[str, str]:
        """The path of every LoRA adapter that the server shows, by name.

        Raises:
            AdapterError: it does not answer, or with something else.
        """
        answer = self.get("/v1/models")
        try:
            models = msgspec.convert(answer, _Models).data
        except MALFORMED as error:
            raise AdapterError(f"{self.url}/v1/models: answered {answer!r}: {error}") from error
        return {model.id: model.root or "" for model in models if model.parent is not None}

    def _ask(self, method: str, path: str, body: object, timeout_seconds: float) -> Any:
        response = self._checked(method, path, body, timeout_seconds)
        try:
            return msgspec.json.decode(response.content) if response.content else None
        except MALFORMED as error:
            said = response.text[:MAX_SAID_CHARACTERS]
            raise AdapterError(f"{self.url}{path}: answered no JSON: {said}") from error

    def _checked(
        self, method: str, path: str, body: object, timeout_seconds: float
    ) -> httpx.Response:
        response = self._send(method, path, body, timeout_seconds)
        if response.is_error:
            said = response.text[:MAX_SAID_CHARACTERS]
            raise AdapterError(f"{self.url}{path}: answered {response.status_code}: {said}")
        return response

    def _send(self, method: str, path: str, body: object, timeout_seconds: float) -> httpx.Response:
        url, token = self.url + path, os.environ.get("CKPT_ENGINE_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Reading the system's certificates takes longer than a small update; plain HTTP needs none.
        transport = httpx.HTTPTransport(uds=self._uds, verify=url.startswith("https:"))
        try:
            with httpx.Client(transport=transport, timeout=timeout_seconds) as client:
                return client.request(method, url, json=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AdapterError(f"{url}: {type(error).__name__}: {error}") from error

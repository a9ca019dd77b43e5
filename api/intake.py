"""A request on its way in, as the routes take it: its body checked, who sent it, and its client still there."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from api.disconnect import ClientGoneError, while_connected
from api.errors import invalid_request
from api.gateway.keys import Identity, identity_of
from api.record import RequestRecord, record_of
from api.schemas.fields import WireModel
from api.state import AppState, app_state
from vlm_serve.errors import InvalidRequestError

T = TypeVar("T")
Asked = TypeVar("Asked", bound=WireModel)


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request to a route that reads its own body."""

    request: Request
    state: AppState

    @property
    def record(self) -> RequestRecord:
        return record_of(self.request.scope)

    @property
    def identity(self) -> Identity:
        return identity_of(self.request.scope)

    async def parse(self, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of the body.

        Raises:
            InvalidRequestError: it is not sent as JSON, or what `parse` raises.
            ClientGoneError: the client left before the end of its body.
        """
        if self.request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page may send other types to a local server without asking it first.
            raise InvalidRequestError("Send the header Content-Type: application/json.")
        try:
            body = await self.request.body()
        except ClientDisconnect:
            raise ClientGoneError from None
        # Megabytes of base64 take time to parse and decode: off the event loop, so that streams go on.
        return await asyncio.to_thread(parse, body)

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which ends with the client.

        Raises:
            ClientGoneError: it left.
        """
        return await while_connected(self.request.receive, work)

    def take_id(self, request_id: str | None) -> None:
        """The client's own id for the log, from the body."""
        if request_id is not None:
            self.record.request_id = request_id


def incoming(request: Request, state: Annotated[AppState, Depends(app_state)]) -> Incoming:
    """As a dependency of a route."""
    return Incoming(request, state)


IncomingRequest = Annotated[Incoming, Depends(incoming)]


def validated(model: type[Asked], body: bytes) -> Asked:
    """The body as a request.

    Raises:
        InvalidRequestError: names the field that is wrong, never its value.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None

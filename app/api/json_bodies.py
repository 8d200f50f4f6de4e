"""Routes whose JSON is counted before it is parsed."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from app.json_limits import MAX_VALUES, check_num_values


class JSONRoute(APIRoute):
    """A route that takes JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Check the body first."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None:
                check_num_values(await request.body(), most=MAX_VALUES)
            return await handler(request)

        return handle

"""Showing the page's token once, and being let in from then on."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from aggregator.page.answers import Done, Problem, Token
from aggregator.page.guard import COOKIE, SESSION_S, Sessions, is_token, session_of

WRONG_S = 1.0
"""How long a wrong token waits for its answer."""


def session_routes(token: str, sessions: Sessions, *, encrypted: bool) -> APIRouter:
    """Return what begins and ends a session."""
    routes = APIRouter(prefix="/api/v1/session", tags=["session"])

    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (403, 409)}

    @routes.post("", response_model=Done, responses=problems)
    async def begin(told: Token) -> Response:
        """Trade the page's token for a cookie."""
        if not token:
            raise HTTPException(409, "this page has no token: it is open to this computer alone")
        if not is_token(token, told.token):
            await asyncio.sleep(WRONG_S)
            raise HTTPException(403, "this is not the page's token")
        return _let_in(sessions, encrypted)

    @routes.delete("")
    async def end(request: Request) -> Done:
        """End the session of this cookie."""
        sessions.end(session_of(Headers(scope=request.scope)))
        return Done(said="the session has ended")

    return routes


def _let_in(sessions: Sessions, encrypted: bool) -> Response:
    answer = JSONResponse(Done(said="welcome").model_dump())
    answer.set_cookie(
        COOKIE,
        sessions.begin(),
        max_age=int(SESSION_S),
        path="/",
        secure=encrypted,
        httponly=True,
        samesite="strict",
    )
    return answer

"""A service in a process of its own, to be killed: the real encoder, the embedded store, the engine that quotes."""

import asyncio
import sys
from pathlib import Path

import uvicorn

from app.api import create_api
from app.services import build_services
from app.settings import LLMSettings, Settings


async def serve(folder: Path, port: int) -> None:
    services = await build_services(Settings(data_dir=folder, llm=LLMSettings(engine="extractive")))
    await uvicorn.Server(uvicorn.Config(create_api(services), port=port, log_config=None)).serve()
    await services.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))

"""Reads an invoice and prints it as JSON of a class of yours: python extract.py FILE [--model NAME]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Literal

from openai import APIConnectionError, OpenAI
from pydantic import BaseModel, Field


class Item(BaseModel):
    what: str = Field(max_length=60)
    quantity: int = Field(ge=1, le=1000)
    price: str = Field(pattern=r"^\d{1,6}\.\d{2}$")


class Invoice(BaseModel):
    number: str = Field(pattern=r"^[A-Z0-9-]{1,20}$")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    currency: Literal["EUR", "USD", "GBP", "CHF"]
    items: list[Item] = Field(min_length=1, max_length=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    args = parser.parse_args()

    client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
    answer = client.chat.completions.parse(
        model=args.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"The invoice, as JSON:\n\n{args.file.read_text()}"}],
        response_format=Invoice,
        max_tokens=600,
        temperature=0,
    )
    invoice = answer.choices[0].message.parsed
    assert invoice is not None
    print(invoice.model_dump_json(indent=2))


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"no server at {error.request.url}; `fptq serve ARTIFACT` starts one")

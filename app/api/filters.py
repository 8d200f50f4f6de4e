"""OpenAI's attribute filters, as far as the stores can do them: all of several fields, each with one of its values."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas import Name, Wanted
from app.domain import Filters, Scalar
from app.errors import InvalidRequest, UnsupportedParameter

MAX_FILTERS = 64


class AttributeFilter(BaseModel):
    """A comparison (`key`, `value`), or several `filters` that are combined."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "and", "or"]
    key: Name | None = Field(None, examples=["author"])
    value: Wanted | None = Field(None, examples=["Marit Oldershaw"])
    filters: list["AttributeFilter"] | None = Field(None, max_length=MAX_FILTERS)


def to_filters(wanted: AttributeFilter, *, param: str) -> Filters:
    """Translate what can be done.

    Raises:
        UnsupportedParameter: a comparison or combination that the stores cannot do.
        InvalidRequest: a filter without its parts.
    """
    if wanted.type == "and":
        filters: dict[str, list[Scalar]] = {}
        for place, one in enumerate(_parts(wanted, param)):
            for key, values in to_filters(one, param=f"{param}.filters.{place}").items():
                if key in filters:
                    raise UnsupportedParameter(
                        f"Two filters are on {key!r}: combine them to one of the type 'in'.", param=param
                    )
                filters[key] = _listed(values)
        return filters
    if wanted.type == "or":
        found = [to_filters(one, param=f"{param}.filters.{n}") for n, one in enumerate(_parts(wanted, param))]
        keys = {key for one in found for key in one}
        if len(keys) != 1:
            raise UnsupportedParameter("Alternatives are taken for one key alone, not for several.", param=param)
        [key] = keys
        return {key: [value for one in found for value in _listed(one[key])]}
    if wanted.type not in ("eq", "in"):
        message = f"Filters match exactly: {wanted.type!r} is not done. Use 'eq', 'in', 'and', or 'or' on one key."
        raise UnsupportedParameter(message, param=f"{param}.type")
    if wanted.key is None or wanted.value is None:
        raise InvalidRequest("A comparison needs a key and a value.", param=param)
    if isinstance(wanted.value, list) != (wanted.type == "in") or wanted.value == []:
        raise InvalidRequest("'in' takes a list that is not empty, 'eq' a single value.", param=f"{param}.value")
    return {wanted.key: _listed(wanted.value)}


def _parts(wanted: AttributeFilter, param: str) -> list[AttributeFilter]:
    if not wanted.filters:
        raise InvalidRequest(f"{wanted.type!r} needs filters to combine.", param=f"{param}.filters")
    return wanted.filters


def _listed(value: Scalar | list[Scalar]) -> list[Scalar]:
    return value if isinstance(value, list) else [value]

"""Every error that Cleave raises on purpose, each with its HTTP status and code.

CleaveError
 +- InvalidRequest            400  the caller can fix it; `param` names the field
 |   +- UnsupportedParameter  400
 |   +- ContextTooLong        400
 |   +- UnknownFilter         400
 |   +- UnreadableFile        400
 |   +- TooLarge              413
 |   +- HeadTooLarge          431
 |   +- CompressedBody        415
 |   +- TooSlow               408
 |   +- CrossOrigin           403
 +- AccessDenied              403  who sent it may not do this
 |   +- InvalidKey            401
 |   +- Forbidden             403
 +- RateLimited               429  the key's budget of this minute is used up; `retry_after_s` says when there is more
 +- NotFound                  404
 |   +- ModelNotFound         404
 |   +- DocumentNotFound      404
 |   +- CollectionNotFound    404
 |   +- IngestionNotFound     404
 |   +- StoredFileNotFound    404
 |   +- BatchNotFound         404
 +- Unavailable               503  try again; `retry_after_s` says when
 |   +- LLMUnavailable        503
 |   |   +- LLMCold           503
 |   +- RetrieverUnavailable  503
 |   +- CollectionMismatch    503
 |   +- KeysUnreadable        503
 |   +- Overloaded            429
 +- WriteConflict             409  others write the same document all the time
 +- DeletionFailed            500  a deleted document is still found
 +- StorageFull               507  the disk has no room for an upload
 +- DeadlineExceeded          504
 +- ConfigurationError        500  the service does not start; the message says what to change
     +- StoreInUse            500

Adapters translate foreign errors into these at their border; the API turns them into OpenAI error objects in
one handler. They pickle, so they cross processes unchanged.
"""


class CleaveError(Exception):
    """Base of all; the message is one line that a user can act on."""

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(CleaveError):
    """The request is wrong in itself."""

    status = 400
    code = "invalid_value"
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A parameter that means something, which Cleave does not do."""

    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    """Messages that do not fit the model's context window."""

    code = "context_length_exceeded"


class UnknownFilter(InvalidRequest):
    """A filter on a field that no document has."""

    code = "unknown_filter"


class UnreadableFile(InvalidRequest):
    """A file that holds no text we can take, with the reason."""

    code = "unreadable_file"


class TooLarge(InvalidRequest):
    """A body or a file over the limit."""

    status = 413
    code = "too_large"


class HeadTooLarge(InvalidRequest):
    """A request line and headers over the limit."""

    status = 431
    code = "headers_too_large"


class CompressedBody(InvalidRequest):
    """A body in a Content-Encoding."""

    status = 415
    code = "compressed_body"


class TooSlow(InvalidRequest):
    """A request that comes slower than anybody's connection is."""

    status = 408
    code = "too_slow"


class CrossOrigin(InvalidRequest):
    """A change asked for by a web page of another site."""

    status = 403
    code = "cross_origin"


class AccessDenied(CleaveError):
    """Whoever sent the request may not do this."""

    status = 403
    code = "forbidden"
    type = "invalid_request_error"


class InvalidKey(AccessDenied):
    """No key, or one that is not, or no longer, valid."""

    status = 401
    code = "invalid_api_key"


class Forbidden(AccessDenied):
    """More than the key may do, or a request from elsewhere to a service without keys."""


class RateLimited(CleaveError):
    """The key has used up its requests or its tokens of this minute."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class NotFound(CleaveError):
    """There is no such thing."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """A model that is not served here."""

    code = "model_not_found"


class DocumentNotFound(NotFound):
    """A document id that the collection does not hold."""

    code = "document_not_found"


class CollectionNotFound(NotFound):
    """A collection that the service does not hold."""

    code = "collection_not_found"


class IngestionNotFound(NotFound):
    """An ingestion that this process does not know of."""

    code = "ingestion_not_found"


class StoredFileNotFound(NotFound):
    """A file that was never sent for a batch, or was deleted."""

    code = "file_not_found"


class BatchNotFound(NotFound):
    """A batch that nobody began."""

    code = "batch_not_found"


class Unavailable(CleaveError):
    """A part is down or starting; the same request can succeed later."""

    status = 503
    code = "unavailable"


class LLMUnavailable(Unavailable):
    """The language model does not answer."""

    code = "llm_unavailable"


class LLMCold(LLMUnavailable):
    """The LLM tier is scaled to zero; the request wakes it."""

    code = "llm_cold"


class RetrieverUnavailable(Unavailable):
    """The retriever does not answer."""

    code = "retriever_unavailable"


class CollectionMismatch(Unavailable):
    """The collection was written with other settings than the service's; until it is rebuilt, nobody uses it."""

    code = "collection_mismatch"


class KeysUnreadable(Unavailable):
    """The file of keys is broken; until it is repaired, nobody is let in."""

    code = "keys_unreadable"


class Overloaded(Unavailable):
    """Too many requests at once."""

    status = 429
    code = "overloaded"
    type = "rate_limit_error"


class WriteConflict(CleaveError):
    """Others write the same document all the time."""

    status = 409
    code = "write_conflict"
    type = "invalid_request_error"


class DeletionFailed(CleaveError):
    """A query still finds chunks of a document that was removed."""

    code = "deletion_failed"


class StorageFull(CleaveError):
    """The disk has no room for an upload."""

    status = 507
    code = "storage_full"


class DeadlineExceeded(CleaveError):
    """The request's deadline passed."""

    status = 504
    code = "deadline_exceeded"
    type = "timeout_error"


class ConfigurationError(CleaveError):
    """The service cannot start like this."""

    code = "configuration_error"


class StoreInUse(ConfigurationError):
    """Documents that another process has open, and that only one may."""

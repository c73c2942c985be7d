"""ApiError: the error for a request that cannot be answered. It has the error object that OpenAI's clients read."""

from pydantic import ValidationError

from cascadeexit.values import shown


class ApiError(Exception):
    """Raised for a request that cannot be answered. The message tells the caller why.

    Attributes:
        status: HTTP status code.
        body: JSON body of the HTTP response, as a dict {error: {message, type, param, code}}.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
                 kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def wrong_request(error: ValidationError) -> ApiError:
    """Convert an error of pydantic to an ApiError about the first fault in the request.

    The message names the field, what was expected, and what came.
    """
    fault = error.errors(include_url=False, include_context=False)[0]
    if fault["type"] == "json_invalid":
        return ApiError(f"expected a JSON object as the body, got something else ({fault['msg']})")
    if fault["type"] == "model_type" and not fault["loc"]:
        return ApiError(f"expected a JSON object as the body, got {shown(fault['input'])}")
    param = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return ApiError(f"{param}: expected a value, got none", param=param)
    message = fault["msg"].removeprefix("Value error, ")
    if not param:                       # a fault of several fields together: the message begins with one of them
        return ApiError(message, param=message.partition(":")[0])
    if fault["type"] != "value_error":
        message = f"{message.replace('Input should be', 'expected')}, got {shown(fault['input'])}"
    return ApiError(f"{param}: {message}", param=param)

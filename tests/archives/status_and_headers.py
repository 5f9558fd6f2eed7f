"""Batch style: sets status, content type and headers per request, as MMS handlers do."""


def handle(data, context):
    if data is None:
        return None
    for index in range(len(data)):
        context.set_response_status(201, "Created", index)
        context.set_response_content_type(index, "text/x-greeting")
        context.set_response_header(index, "x-request", context.get_request_id(index))
        context.set_response_header(index, "x-seen", context.get_request_header(index, "x-asked") or "nothing")
    return ["hello"] * len(data)

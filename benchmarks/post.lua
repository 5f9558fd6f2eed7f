-- wrk -s post.lua URL -- BODYFILE [SIZE]
-- Posts the file over and over, with a SIZE in chunks of so many bytes, and ends with one line: RESULT {json}.
function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  wrk.headers["Content-Type"] = "application/octet-stream"
  formatted = wrk.format()
  local size = tonumber(arguments[2])
  if size then
    formatted = in_chunks(size)
  end
end

function in_chunks(size)
  local body = wrk.body
  local head = formatted:sub(1, -#body - 1):gsub("Content%-Length: %d+", "Transfer-Encoding: chunked")
  local parts = {head}
  for at = 1, #body, size do
    local chunk = body:sub(at, at + size - 1)
    parts[#parts + 1] = string.format("%x\r\n%s\r\n", #chunk, chunk)
  end
  parts[#parts + 1] = "0\r\n\r\n"
  return table.concat(parts)
end

function request()
  return formatted
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%.6f,"p50":%.4f,"p99":%.4f,"status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end

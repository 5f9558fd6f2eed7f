-- wrk -s post.lua URL -- BODYFILE [SIZE]
-- Posts the file over and over, in chunks of SIZE bytes if that is given, and ends with one line: RESULT {json}.
function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  local body = file:read("*a")
  file:close()
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/octet-stream"
  local size = tonumber(arguments[2])
  if size then
    wrk.headers["Transfer-Encoding"] = "chunked"
    formatted = wrk.format() .. in_chunks(body, size)
  else
    wrk.body = body
    formatted = wrk.format()
  end
end

function in_chunks(body, size)
  local parts = {}
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

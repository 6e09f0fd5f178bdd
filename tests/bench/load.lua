-- What wrk sends, and what it tells: one line of JSON at the end.
--   wrk ... -s load.lua URL -- METHOD BODYFILE|- RATE|0 LIMIT|0 STATUSES|0
-- RATE: requests a second of each thread, on a schedule (one that falls behind does not catch up).
-- LIMIT: answers after which each thread stops. STATUSES: count answers by status.
local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds; long nanoseconds; } bench_time;
int clock_gettime(int clock, bench_time *now);
int getpid(void);
int kill(int process, int signal);
]]

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

local now = ffi.new("bench_time")
local function clock()
  ffi.C.clock_gettime(1, now)
  return tonumber(now.seconds) * 1000 + tonumber(now.nanoseconds) / 1e6
end

function init(arguments)
  wrk.method = arguments[1]
  if arguments[2] ~= "-" then
    local file = assert(io.open(arguments[2], "rb"))
    wrk.body = file:read("*a")
    file:close()
  end
  local rate, limit, by_status = tonumber(arguments[3]), tonumber(arguments[4]), arguments[5] ~= "0"
  local whole = wrk.format()
  request = function() return whole end
  if rate > 0 then
    local due = 0
    delay = function()
      local at = clock()
      due = math.max(due + 1000 / rate, at)
      return math.floor(due - at)
    end
  end
  answered, statuses = 0, {}
  if limit > 0 or by_status then
    response = function(status)
      answered = answered + 1
      if by_status then statuses[status] = (statuses[status] or 0) + 1 end
      if limit > 0 and answered == limit then
        wrk.thread:stop()
        -- wrk itself sleeps until its time is over, or until somebody presses Ctrl-C.
        ffi.C.kill(ffi.C.getpid(), 2)
      end
    end
  end
end

function done(summary, latency)
  local total = {}
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("statuses") or {}) do
      total[status] = (total[status] or 0) + count
    end
  end
  local counted = {}
  for status, count in pairs(total) do
    table.insert(counted, string.format('"%d":%d', status, count))
  end
  local e = summary.errors
  io.write(string.format(
    '\nBENCH {"requests":%d,"seconds":%.6f,"bytes":%d,"p50":%.4f,"p90":%.4f,"p99":%.4f,' ..
    '"longest":%.4f,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d,"statuses":{%s}}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    latency:percentile(50) / 1000, latency:percentile(90) / 1000, latency:percentile(99) / 1000,
    latency.max / 1000, e.connect, e.read, e.write, e.status, e.timeout,
    table.concat(counted, ",")))
end

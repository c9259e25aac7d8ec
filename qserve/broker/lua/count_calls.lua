#!lua flags=allow-oom
-- COUNT_CALLS: add to the counts of the current ten seconds of a deployment, and note how its queue is now.
-- A bucket is {slot, arrivals, entries ever put, depth, waiting, ms the first waits, replicas, ends, waits, runs}; the last
-- three are lists of names or places, each followed by a count. The list of buckets has the newest first. Where nothing
-- happens there is no bucket, but for one every five minutes that says so.
-- KEYS[1] list of buckets, KEYS[2] call stream, KEYS[3] heartbeats, KEYS[4] durable calls of low priority
-- ARGV[1] group, ARGV[2] msgpack of {ends, waits, runs}, or '' to count nothing, ARGV[3] most buckets kept,
-- ARGV[4] ms they are kept, then keys of indexes whose oldest calls may have no record any more
-- returns 1
local SLOT_S, QUIET = 10, 30
local now = redis.call('TIME')
local slot = math.floor(now[1] / SLOT_S)
local packed = redis.call('LINDEX', KEYS[1], 0)
local newest = packed and cmsgpack.unpack(packed) or nil

local function sum(into, more)
  local place = {}
  for i = 1, #into, 2 do place[into[i]] = i + 1 end
  for i = 1, #more, 2 do
    local at = place[more[i]]
    if at then
      into[at] = into[at] + more[i + 1]
    else
      into[#into + 1] = more[i]
      into[#into + 1] = more[i + 1]
    end
  end
end

local ever = 0
if redis.call('EXISTS', KEYS[2]) == 1 then
  local facts = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #facts, 2 do
    if facts[i] == 'entries-added' then ever = facts[i + 1] end
  end
end
local taken, oldest = taken_and_oldest(KEYS[2], ARGV[1])
local depth = redis.call('XLEN', KEYS[2]) + redis.call('ZCARD', KEYS[4])
local replicas = 0
for _, beat in ipairs(redis.call('HVALS', KEYS[3])) do
  if tonumber(beat) then replicas = replicas + 1 end
end
local before = newest and newest[3] or ever
local arrivals = ever >= before and ever - before or ever
local counts = ARGV[2] ~= '' and cmsgpack.unpack(ARGV[2]) or {{}, {}, {}}

if newest and newest[1] >= slot then
  newest[2], newest[3] = newest[2] + arrivals, ever
  newest[4], newest[5] = math.max(newest[4], depth), math.max(newest[5], depth - taken)
  newest[6], newest[7] = math.max(newest[6], oldest), replicas
  for i = 1, 3 do sum(newest[7 + i], counts[i]) end
  redis.call('LSET', KEYS[1], 0, cmsgpack.pack(newest))
else
  local quiet = newest and ARGV[2] == '' and arrivals == 0 and depth == 0 and newest[4] == 0 and newest[7] == replicas
  if not quiet or slot - newest[1] >= QUIET then
    local bucket = {slot, arrivals, ever, depth, depth - taken, oldest, replicas, counts[1], counts[2], counts[3]}
    redis.call('LPUSH', KEYS[1], cmsgpack.pack(bucket))
    redis.call('LTRIM', KEYS[1], 0, ARGV[3] - 1)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
  end
end

for i = 5, #ARGV do
  local base = string.match(ARGV[i], '^qs:{.-}:')
  for _ = 1, 10 do
    local gone, oldest_calls = 0, redis.call('ZRANGE', ARGV[i], 0, 99)
    for _, id in ipairs(oldest_calls) do
      if redis.call('EXISTS', base .. 'call:' .. id) == 0 then
        redis.call('ZREM', ARGV[i], id)
        gone = gone + 1
      end
    end
    if gone < 100 then break end
  end
end
return 1

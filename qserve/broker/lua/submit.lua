-- SUBMIT: put durable calls, each with its record, in one step; bounded like ADMIT, but what waits for its time counts.
-- Submitted again under its id, a call is not put twice: whoever lost the answer may ask again.
-- KEYS[1] call stream, KEYS[2] meta hash, KEYS[3] calls not due yet, KEYS[4] calls of low priority, KEYS[5] name of this
-- history of the state
-- ARGV[1] base, ARGV[2] deployment, then per call: id, frame, ms until due, ms until it expires or 0, kind, method,
--   waiter or '', 'b' low priority or '', idempotency hash or '', body hash, ms an idempotency hash is kept,
--   ms the record is kept or '' as others are, Celery's task id or '', idempotency key as its caller gave it or '', id of
--   the call that made it or '', '1' if its payload was stored apart before or ''
-- returns {-1} unknown deployment | {-2, reason} refused | {-4} there is no state at all: this server has lost it, or never
--   had any | {depth before, per call: 'queued' | false: full | 'same:<id>' another call has this key | 'other:<id>' and
--   another body | 'payload' was not stored: there was no memory for it}
local base, deployment, now = ARGV[1], ARGV[2], now_ms()

-- The large payload of a call that is not taken has been stored before.
local function forget(id) redis.call('DEL', base .. 'p:' .. id) end

local function refuse_all(answer)
  for i = 3, #ARGV, 16 do
    if redis.call('EXISTS', base .. 'call:' .. ARGV[i]) == 0 then forget(ARGV[i]) end
  end
  return answer
end

local meta = redis.call('HMGET', KEYS[2], 'max_queued', 'refuse')
if not meta[1] then return refuse_all({redis.call('EXISTS', KEYS[5]) == 1 and -1 or -4}) end
if meta[2] then return refuse_all({-2, meta[2]}) end
local depth = redis.call('XLEN', KEYS[1]) + redis.call('ZCARD', KEYS[3]) + redis.call('ZCARD', KEYS[4])
local room = tonumber(meta[1]) - depth
local SEEN_IN_TIME_MS, INBOX_TTL_MS = 1500, 35000
local out = {depth}

-- Which calls have an idempotency key: several only where different clients chose the same one.
local function remember_key(base, key, id, now, ttl)
  local calls = base .. 'named:' .. redis.sha1hex(key)
  redis.call('ZADD', calls, now, id)
  redis.call('ZREMRANGEBYRANK', calls, 0, -101)
  redis.call('PEXPIRE', calls, ttl)
end

-- A call that is there already is written once more as it is: whoever waits for what he has written to be on the disk or on a
-- replica would have nothing to wait for, and the first who submitted it may have waited in vain.
local function write_again(record) redis.call('HINCRBY', record, 'n', 0) end

local is_first = false  -- a call waits now before which none did: whoever moves them does not know of it

local function submit(id, frame, delay, expires, kind, method, waiter, low, idem, body, idem_ttl, ttl, celery, key, parent, large)
  local record = base .. 'call:' .. id
  if redis.call('EXISTS', record) == 1 then
    write_again(record)
    return 'queued'
  end
  local known = idem ~= '' and redis.call('GET', base .. 'idem:' .. idem)
  if known then
    local first, hash = string.match(known, '^(%S+) (%S+)$')
    if redis.call('EXISTS', base .. 'call:' .. first) == 1 then
      write_again(base .. 'call:' .. first)
      forget(id)
      return (hash == body and 'same:' or 'other:') .. first
    end
  end
  if large ~= '' and redis.call('EXISTS', base .. 'p:' .. id) == 0 then return 'payload' end
  if room <= 0 then
    forget(id)
    return false
  end
  room = room - 1
  if idem ~= '' then redis.call('SET', base .. 'idem:' .. idem, id .. ' ' .. body, 'PX', idem_ttl) end
  if key ~= '' then remember_key(base, key, id, now, idem_ttl) end
  if parent ~= '' then note_child(base .. 'call:' .. parent, id) end
  redis.call('PERSIST', base .. 'p:' .. id)
  local fields = {'state', 'queued', 'deployment', deployment, 'kind', kind, 'method', method, 'attempts', 0,
    'submitted', whole(now), 'waiters', waiter}
  local function put(name, value) fields[#fields + 1] = name fields[#fields + 1] = value end
  if expires ~= '0' then put('expires', whole(now + expires)) end
  if low == 'b' then put('low', '1') end
  if ttl ~= '' then put('ttl', ttl) end
  if celery ~= '' then put('celery', celery) end
  if key ~= '' then put('key', key) end
  if parent ~= '' then put('parent', parent) end
  local event = 'queued'
  if delay ~= '0' then
    event = 'scheduled'
    fields[2] = 'scheduled'
    put('due', whole(now + delay))
    put('frame', frame)
    redis.call('ZADD', KEYS[3], now + delay, id)
    is_first = is_first or (tonumber(delay) < SEEN_IN_TIME_MS and redis.call('ZRANGE', KEYS[3], 0, 0)[1] == id)
  elseif low == 'b' then
    put('frame', frame)
    wait_in_turn(KEYS[4], now, id)
    is_first = is_first or redis.call('ZCARD', KEYS[4]) == 1
  else
    local entry = enqueue(KEYS[1], id, frame)
    if not entry then return -1 end
    put('entry', entry)
  end
  note(record, 0, now, event, '', unpack(fields))
  return 'queued'
end

for i = 3, #ARGV, 16 do
  local answer = submit(unpack(ARGV, i, i + 15))
  if answer == -1 then return {-1} end
  out[#out + 1] = answer
end
if is_first then
  -- Not every user of Redis may read who that is: then it looks by itself, within a second.
  local mover = redis.pcall('GET', base .. 'mover:' .. deployment)
  if type(mover) == 'string' then tell(base, mover, '', INBOX_TTL_MS) end
end
return out

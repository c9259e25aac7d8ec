-- What the scripts of durable calls share; put before each of them.
-- A record is a hash: state, deployment, kind, method, attempts, failures, submitted, started, ended, entry (in the
-- stream) or frame (while it waits in a sorted set), waiters, cancel, expires, result, error, progress, celery (its task
-- id, if a Celery client submitted it), ttl (ms it is kept, where that is not what others are), again (the frame of a failed
-- call, which can be sent again), letter (the id of a dead one's letter), key (the idempotency key its caller gave), parent (the call that made it), children (how
-- many durable calls it has made, of which c1, c2, ... are the first); n counts its
-- events e1, e2, ... ("name ms data") and, once there are some, its parts with them (parts, part: how many, in all and in
-- this attempt; then an event is "number name ms data"). Every key is base .. something, and base is the namespace's prefix.
local ENDED = {done = true, failed = true, cancelled = true, dead = true, expired = true}
local EVENTS_KEPT = 100
local CHILDREN_KEPT = 100
-- The index of a deployment's calls: a sorted set for each state, by when the call entered it. What has ended is kept up to
-- a number, and as long as the records last.
local INDEXED, INDEXED_MS = 10000, 691200000

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function whole(number) return string.format('%.0f', number) end

-- Keep a key for so long at least.
local function last_longer(key, ms)
  if redis.call('PTTL', key) < tonumber(ms) then redis.call('PEXPIRE', key, ms) end
end

-- Move a call from the index of one state to that of another.
local function index(record, deployment, before, after, now)
  if before == after or not deployment then return end
  local base, id = string.match(record, '^(qs:{.-}:)call:(.*)$')
  if before then redis.call('ZREM', base .. 'index:' .. before .. ':' .. deployment, id) end
  local key = base .. 'index:' .. after .. ':' .. deployment
  redis.call('ZADD', key, now, id)
  if ENDED[after] then
    redis.call('ZREMRANGEBYRANK', key, 0, -INDEXED - 1)
    last_longer(key, INDEXED_MS)
  end
end

-- Write fields and one event into a record, and wake those who follow it.
local function note(record, n, now, event, data, ...)
  n = (tonumber(n) or 0) + 1
  local known = redis.call('HMGET', record, 'parts', 'state', 'deployment')
  local parts, before, deployment, after = tonumber(known[1] or '0'), known[2], known[3], nil
  local fields = {...}
  for i = 1, #fields, 2 do
    if fields[i] == 'state' then after = fields[i + 1] end
    if fields[i] == 'deployment' then deployment = fields[i + 1] end
  end
  if after then index(record, deployment, before, after, now) end
  local place, number = n - parts, parts > 0 and n .. ' ' or ''
  redis.call('HSET', record, 'n', n, 'e' .. place, number .. event .. ' ' .. whole(now) .. ' ' .. data, ...)
  if place > EVENTS_KEPT then redis.call('HDEL', record, 'e' .. (place - EVENTS_KEPT)) end
  redis.call('PUBLISH', record, n)
end

-- Note in the record of a durable call, if it lies here, that it has made another one.
local function note_child(record, id)
  if redis.call('EXISTS', record) == 0 then return end
  local count = redis.call('HINCRBY', record, 'children', 1)
  if count <= CHILDREN_KEPT then redis.call('HSET', record, 'c' .. count, id) end
end

-- Put a frame into the inbox of every process that waits for the call, if it lives.
local function tell(base, waiters, frame, inbox_ttl)
  for waiter in string.gmatch(waiters or '', '%S+') do
    if redis.call('EXISTS', base .. 'alive:' .. waiter) == 1 then
      local inbox = base .. 'inbox:' .. waiter
      redis.call('XADD', inbox, '*', 'd', frame)
      redis.call('PEXPIRE', inbox, inbox_ttl)
    end
  end
end

-- What Celery's result backend for Redis expects of the end of a task: the key, and word of it. `outcome`: JSON of the
-- fields that tell the result, or '' where the state tells it all.
local CELERY = {done = 'SUCCESS', failed = 'FAILURE', dead = 'FAILURE', cancelled = 'REVOKED', expired = 'REVOKED'}

local function tell_celery(base, task, state, outcome, ttl)
  if outcome == '' then
    local kind, why = '"TaskRevokedError","exc_module":"celery.exceptions"', state
    if state == 'failed' then
      kind, why = '"DeploymentNotFound","exc_module":"qserve.errors"', 'the deployment was deleted'
    elseif state == 'dead' then
      kind, why = '"FrameRejected","exc_module":"qserve.errors"', 'no key of the instance signed the call'
    end
    outcome = '"result":{"exc_type":' .. kind .. ',"exc_message":["' .. why .. '"]},"traceback":null,"date_done":null'
  end
  local meta = '{"status":"' .. CELERY[state] .. '",' .. outcome .. ',"children":[],"task_id":' .. cjson.encode(task) .. '}'
  local key = base .. 'celery:celery-task-meta-' .. task
  redis.call('SET', key, meta, 'PX', ttl)
  redis.call('PUBLISH', key, meta)
end

-- The call's one end. The waiters stay: a dead letter sent again ends once more.
local function finish(base, id, now, state, frame, ttl, inbox_ttl, data, outcome)
  local record = base .. 'call:' .. id
  local found = redis.call('HMGET', record, 'n', 'waiters', 'celery', 'parts', 'deployment')
  redis.call('HDEL', record, 'frame', 'due', 'cancel', 'replica')
  note(record, found[1], now, state, data, 'state', state, 'ended', whole(now), 'result', frame)
  redis.call('PEXPIRE', record, ttl)
  if found[5] then last_longer(base .. 'index:' .. state .. ':' .. found[5], ttl) end
  if state == 'dead' or state == 'failed' then
    redis.call('PEXPIRE', base .. 'p:' .. id, ttl)
  else
    redis.call('DEL', base .. 'p:' .. id)
  end
  if found[4] then redis.call('PEXPIRE', base .. 'parts:' .. id, ttl) end
  tell(base, found[2], frame, inbox_ttl)
  if found[3] then tell_celery(base, found[3], state, outcome or '', ttl) end
end

-- Into the stream. The fourth field keeps these entries off the path that replicas have for ordinary ones.
local function enqueue(stream, id, frame)
  return redis.call('XADD', stream, 'NOMKSTREAM', '*', 'r', id, 'f', 'sd', 'd', frame, 'v', '1')
end

-- Behind all calls of low priority that wait already, whatever the clock says: their ids are random, so among equal scores
-- chance would choose. A score of today has room for thousandths of a millisecond.
local function wait_in_turn(set, now, id)
  local last = redis.call('ZRANGE', set, -1, -1, 'WITHSCORES')
  redis.call('ZADD', set, math.max(now, (tonumber(last[2]) or 0) + 0.001), id)
end

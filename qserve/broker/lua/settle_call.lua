#!lua flags=allow-oom
-- SETTLE_CALL: acknowledge a durable call, and write its end (or its next attempt) into its record, in one step. The first
-- finisher wins.
-- KEYS[1] call stream, KEYS[2] dead-letter stream, KEYS[3] calls not due yet
-- ARGV[1] base, ARGV[2] group, ARGV[3] entry id, ARGV[4] id, ARGV[5] state: an end, or 'scheduled' to run again,
-- ARGV[6] result frame, ARGV[7] ms the record is kept, or until it runs again, ARGV[8] ms an unread inbox is kept,
-- ARGV[9] what the event says, ARGV[10] most dead letters kept, ARGV[11] the last error, or '', ARGV[12] what Celery's
-- result backend is told, or '', ARGV[13] who has stored its result apart before, or '', ARGV[14] which attempt has ended so,
-- or ''
-- returns 1 if this was the first answer | an error, and nothing is done, where that result was not stored
local base, entry, id, state = ARGV[1], ARGV[3], ARGV[4], ARGV[5]
local stored = base .. 'p:' .. id .. ':r:' .. ARGV[13] -- by one of several who may have run it
local latest = redis.call('HMGET', base .. 'call:' .. id, 'attempts', 'parts')
if ARGV[14] ~= '' and latest[1] and latest[1] ~= ARGV[14] and (latest[2] or state == 'scheduled') then
  redis.call('DEL', stored)
  return 0 -- a replica that was thought dead: whoever reads parts reads those of the attempt that has begun since
end
if ARGV[13] ~= '' and redis.call('EXISTS', stored) == 0 then
  return redis.error_reply('OOM its large result could not be stored')
end
if redis.call('XACK', KEYS[1], ARGV[2], entry) == 0 then
  redis.call('DEL', stored)
  return 0
end
local record, now = base .. 'call:' .. id, now_ms()
if redis.call('EXISTS', record) == 0 then
  redis.call('XDEL', KEYS[1], entry)
  redis.call('DEL', stored)
  return 1
end
if ARGV[13] ~= '' then
  local result = base .. 'p:' .. id .. ':r'
  redis.call('RENAME', stored, result)
  redis.call('PEXPIRE', result, ARGV[7])
end
if ARGV[11] ~= '' then redis.call('HSET', record, 'error', ARGV[11]) end
if state == 'scheduled' then
  local put = redis.call('XRANGE', KEYS[1], entry, entry)
  -- One that was cancelled while it ran ends as soon as it is due.
  local due = redis.call('HEXISTS', record, 'cancel') == 1 and now or now + tonumber(ARGV[7])
  -- fields: r, id, f, flags, d, frame
  redis.call('HINCRBY', record, 'failures', 1)
  note(record, redis.call('HGET', record, 'n'), now, 'retrying', ARGV[9],
    'state', 'scheduled', 'due', whole(due), 'frame', put[1][2][6])
  redis.call('ZADD', KEYS[3], due, id)
else
  if state == 'failed' then
    local put = redis.call('XRANGE', KEYS[1], entry, entry)
    if put[1] then redis.call('HSET', record, 'again', put[1][2][6]) end
  end
  if state == 'dead' then
    redis.call('HSET', record, 'letter', bury(KEYS[1], KEYS[2], entry, id, ARGV[11], ARGV[10]))
  end
  finish(base, id, now, state, ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[12])
end
redis.call('XDEL', KEYS[1], entry)
return 1

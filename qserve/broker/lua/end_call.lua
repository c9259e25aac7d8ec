#!lua flags=allow-oom
-- END_CALL: end a durable call that its replica does not end: cancel it, let it expire, or fail it because its deployment
-- is gone and nobody can run it. One that runs now is marked instead, and does not run again.
-- KEYS[1] record | ARGV[1] base, ARGV[2] id, ARGV[3] group, ARGV[4] 'cancelled', 'expired' or 'failed', ARGV[5] frame for those
-- who wait, ARGV[6] ms the record is kept if it does not say, ARGV[7] ms an unread inbox is kept
-- returns 'unknown' | 'ended' before | 'done' | {replica, entry id, deployment} it runs there | 'later' about to run
local base, id = ARGV[1], ARGV[2]
local found = redis.call('HMGET', KEYS[1], 'state', 'deployment', 'entry', 'replica', 'expires', 'ttl')
if not found[1] then return 'unknown' end
if ENDED[found[1]] then return 'ended' end
local now = now_ms()
if ARGV[4] == 'expired' and (found[1] == 'running' or not found[5] or now <= tonumber(found[5])) then return 'later' end
if found[1] == 'running' and ARGV[4] ~= 'failed' then
  redis.call('HSET', KEYS[1], 'cancel', ARGV[5])
  return {found[4], found[3], found[2]}
end
local stream = base .. 'q:' .. found[2]
if redis.call('ZREM', base .. 'due:' .. found[2], id) == 0 and redis.call('ZREM', base .. 'low:' .. found[2], id) == 0 then
  if found[3] and ARGV[4] == 'failed' then
    redis.pcall('XACK', stream, ARGV[3], found[3])
  elseif found[3] and #redis.call('XPENDING', stream, ARGV[3], found[3], found[3], 1) > 0 then
    redis.call('HSET', KEYS[1], 'cancel', ARGV[5])
    return 'later'
  end
  if found[3] then redis.call('XDEL', stream, found[3]) end
end
finish(base, id, now, ARGV[4], ARGV[5], found[6] or ARGV[6], ARGV[7], '')
return 'done'

#!lua flags=allow-oom
-- RUN_CALL: note that a replica is about to run a durable call, if its record says that it still should.
-- KEYS[1] call stream, KEYS[2] record, KEYS[3] its parts | ARGV[1] group, ARGV[2] replica, ARGV[3] entry id
-- returns {'run', which attempt, failures so far} | {'cancelled', frame} | {'expired'} | {'lost'} not its entry any more |
--   {'gone'} nothing to run: the entry is deleted
local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if #mine == 0 then return {'lost'} end
local found = redis.call('HMGET', KEYS[2], 'state', 'entry', 'cancel', 'expires', 'attempts', 'failures', 'n')
if not found[1] or ENDED[found[1]] or found[2] ~= ARGV[3] then
  -- A copy of an entry, or one whose record has gone its way without it.
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
  redis.call('XDEL', KEYS[1], ARGV[3])
  return {'gone'}
end
local now = now_ms()
if found[3] then return {'cancelled', found[3]} end
if found[4] and now > tonumber(found[4]) then return {'expired'} end
local attempt = tonumber(found[5]) + 1
if attempt > 1 then
  redis.call('DEL', KEYS[3]) -- it gives all of them anew
  redis.call('HDEL', KEYS[2], 'part')
end
note(KEYS[2], found[7], now, 'started', whole(attempt),
  'state', 'running', 'started', whole(now), 'replica', ARGV[2], 'attempts', attempt)
return {'run', attempt, tonumber(found[6] or '0')}

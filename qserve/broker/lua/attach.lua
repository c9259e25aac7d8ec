#!lua flags=allow-oom
-- ATTACH: return the outcome of a durable call; if there is none yet, note who is to be told of it.
-- KEYS[1] record | ARGV[1] base, ARGV[2] waiter
-- returns false unknown | {state, deployment, method, result or false, progress or false, ms until it expires, below 0 if
--   it is past its time, or '' if it does not expire}
local found = redis.call('HMGET', KEYS[1], 'state', 'deployment', 'method', 'result', 'progress', 'waiters', 'expires')
if not found[1] then return false end
if ENDED[found[1]] then return {found[1], found[2], found[3], found[4], found[5], ''} end
local waiters = {ARGV[2]}
for waiter in string.gmatch(found[6] or '', '%S+') do
  if waiter ~= ARGV[2] and redis.call('EXISTS', ARGV[1] .. 'alive:' .. waiter) == 1 then
    waiters[#waiters + 1] = waiter
  end
end
redis.call('HSET', KEYS[1], 'waiters', table.concat(waiters, ' '))
local left = found[7] and tonumber(found[7]) - now_ms()
if not left or (left < 0 and found[1] == 'running') then return {found[1], found[2], found[3], false, found[5], ''} end
return {found[1], found[2], found[3], false, found[5], whole(left)}

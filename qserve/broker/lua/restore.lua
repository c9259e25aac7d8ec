-- RESTORE: put back a deployment that the server has forgotten. One that it knows stays as it is, and so does one that
-- was deleted, whose generation is left; of several that remember, the one with the newest generation wins.
-- KEYS[1] meta hash, KEYS[2] set of deployment names, KEYS[3] state log, KEYS[4] call stream
-- ARGV[1] name, ARGV[2] generation, ARGV[3] spec frame, ARGV[4] group, ARGV[5] state, ARGV[6] error, then names and
-- values of the options that scripts look up
-- returns 1 if it was put back, else 0
local known = redis.call('HMGET', KEYS[1], 'gen', 'restored')
if known[1] and not (known[2] and tonumber(known[1]) < tonumber(ARGV[2])) then return 0 end
write_deployment(ARGV[1], ARGV[2], ARGV[3], ARGV[5], ARGV[6], ARGV[4], 'restored', '1', unpack(ARGV, 7))
return 1

-- LEASE: take a lease, or keep it for longer.
-- KEYS[1] lease | ARGV[1] who wants it, ARGV[2] ms it is held
-- returns 1 if it is held now | 0 another has it
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1

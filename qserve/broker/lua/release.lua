-- RELEASE: give a lease back.
-- KEYS[1] lease | ARGV[1] who holds it
-- returns 1 | 0 another holds it, or nobody does
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0

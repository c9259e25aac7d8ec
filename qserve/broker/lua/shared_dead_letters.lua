-- What the scripts that give calls up share; put before each of them.
-- Move an entry of a call stream to the dead letters, with the reason and the entry's id there. Where the entry is gone,
-- the letter has no more than the call's id; without one there is none. Returns the letter's id.
local function bury(stream, letters, entry, id, reason, kept)
  local put = redis.call('XRANGE', stream, entry, entry)
  local fields = put[1] and put[1][2] or (id and {'r', id})
  if not fields then return end
  for _, field in ipairs({'err', reason, 'src', entry}) do fields[#fields + 1] = field end
  local letter = redis.call('XADD', letters, 'MAXLEN', '~', kept, '*', unpack(fields))
  redis.call('XDEL', stream, entry)
  return letter
end


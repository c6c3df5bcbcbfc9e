package config

// removed are keys that earlier releases had, with what to do instead. They
// are a warning for one release, then they leave this table and are errors as
// any other unknown key.
var removed = map[string]string{}

package sandbox

// Alive says whether the process that owns the sandbox still runs.
func (s *State) Alive() bool { return alive(s.Shim) }

package node

// The parts of Watch.
var (
	Subscribe    = subscribe
	WatchOn      = watch
	Matters      = matters
	KeepWatching = keepWatching
)

package node

// The parts of Watch and of Bypasses.
var (
	DataPlanes    = dataPlanes
	Subscribe     = subscribe
	WatchOn       = watch
	Matters       = matters
	OfLocalRoutes = ofLocalRoutes
	KeepWatching  = keepWatching
)

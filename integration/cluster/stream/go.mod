module github.com/magic-ip-address/magic-ip-address/integration/cluster/stream

go 1.26.8

replace github.com/magic-ip-address/magic-ip-address => ../../..

require (
	github.com/magic-ip-address/magic-ip-address v0.0.0
	google.golang.org/grpc v1.83.2
	google.golang.org/protobuf v1.36.12-0.20260120151049-f2248ac996af
)

require (
	github.com/vishvananda/netns v0.0.5 // indirect
	golang.org/x/net v0.61.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/text v0.43.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260526163538-3dc84a4a5aaa // indirect
)
